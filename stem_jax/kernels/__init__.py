"""What is written by platform: each kernel has a way for every one, and any way runs on CPUs."""
