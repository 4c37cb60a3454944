"""What a trained model is worth: standard tasks, bits per byte, needles in a haystack."""
