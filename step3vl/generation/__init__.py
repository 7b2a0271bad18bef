"""Models in use: prompts in, completions out. Evaluation, logged samples and rollouts generate through this room."""
