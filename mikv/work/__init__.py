"""What there is to do in a run, for any kind of task: units of work in, requests to the engine, outcomes back."""
