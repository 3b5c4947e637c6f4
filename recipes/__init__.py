"""Files of settings for train.py, and terms.py, the losses that only published recipes use."""
