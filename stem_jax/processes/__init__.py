"""The processes of a run: joining, agreeing, being told to stop, being watched."""
