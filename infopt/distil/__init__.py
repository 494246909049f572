"""Training a model to say what another says: examples, what the teacher says of them, losses, and the loop."""
