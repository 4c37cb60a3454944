"""What a trained model's rows hold, what it costs and what its context touches; the page of it."""
