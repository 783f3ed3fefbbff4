"""Tasks: what is asked of the model, and how an answer is judged."""
