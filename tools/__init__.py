"""Programs next to the trainer. Start them as modules, for example: python -m tools.bench"""
