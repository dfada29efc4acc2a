"""The Hugging Face Trainer with verified checkpoints and exact resume; independent of the configuration."""
