"""Files of settings for train.py, and published.py, the losses that only some of them use."""
