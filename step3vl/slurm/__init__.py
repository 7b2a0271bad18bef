"""A run as a SLURM job: checked against its configuration, written as an sbatch script, submitted."""
