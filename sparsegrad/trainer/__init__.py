"""The Hugging Face Trainer with sealed checkpoints and exact resume; it knows no configuration."""
