"""Programs beside the trainer: python -m tools.bench, python -m tools.train_vae."""
