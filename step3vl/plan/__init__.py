"""What a run will need before it is queued: memory a GPU, FLOPs, days, checkpoint sizes, and what was assumed."""
