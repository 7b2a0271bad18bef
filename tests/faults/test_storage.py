"""R16 and R7 behind the command line: a disk that fills and a bit that flips are told, and the same command goes on."""

import resource

from step3vl.weights.manifest import verify
from step3vl.weights.runs import saved_steps

from .processes import Run
from .test_killed import assert_same_run


def small_files(rank):
    """No file of this process may grow beyond 2 MB, as if the disk were full; a checkpoint has 18."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))


def test_a_full_disk_and_a_flipped_bit_cost_a_step_each(begun, whole):
    before = saved_steps(begun / "checkpoints")
    full = Run("begun", prepare=small_files)
    assert full.wait() == [2], full.said()
    said = full.said()
    sentence = next(line for line in reversed(said.splitlines()) if line.startswith("error: "))
    assert "could not be saved: " in sentence and "too large" in sentence and "before it are untouched" in sentence
    assert "Traceback" not in said
    assert saved_steps(begun / "checkpoints") == before
    newest, other = before[:2]
    verify(newest)

    file = newest / "tensors-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    again = Run("begun")
    again.finish()
    said = again.said()
    assert f"checkpoint refused: begun/checkpoints/{newest.name}/{file.name} is damaged: its checksum differs" in said
    assert f"going on from begun/checkpoints/{other.name}, the newest that is whole" in said
    assert "held 1 checkpoint after step" in said and (begun / "checkpoints.1" / newest.name).is_dir()
    assert_same_run("begun", whole)
