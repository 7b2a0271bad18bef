"""Handing a script to sbatch, through submitit (extra `slurm`), which keeps script and logs of a job together."""

from __future__ import annotations

from pathlib import Path

from step3vl.config import ConfigError


def submit(script: str, folder: Path) -> str:
    """Submit a script; returns SLURM's job id. The script is kept in `folder` under that id.

    Raises ConfigError without submitit, without a SLURM client on this machine, or when sbatch refuses.
    """
    by_hand = "or write it with --dry-run > job.sbatch and submit that with sbatch"
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ModuleNotFoundError:
        raise ConfigError(f"--submit needs submitit: pip install -e '.[slurm]'; {by_hand}") from None

    class OwnScript(SlurmExecutor):
        """Submits our text instead of a pickled function, so that what a dry run prints is what runs."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return script

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return str(OwnScript(folder)._submit_command("").job_id)
    except RuntimeError as error:
        if isinstance(error, FailedJobError | FailedSubmissionError):
            raise ConfigError(f"sbatch refused the job: {' '.join(str(error).split())}") from None
        raise ConfigError(f"there is no srun on this machine; submit from a login node, {by_hand}") from None
