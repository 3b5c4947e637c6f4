"""What train.py stands on, and a forker need not read: settings, files, the record of a run."""
