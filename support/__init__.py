"""What train.py and sample.py need around the method: settings, files, logs, and the machine."""
