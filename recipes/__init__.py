"""Files of settings for train.py, and published.py with losses that only some of them use."""
