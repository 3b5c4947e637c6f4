# What the recipes of TAESD's author have in common (taesd issue 11): Adam at a constant rate, none of our additions.
optimizer = "adam"
learning_rate = 3e-4
cooldown = 0.0
window = 0
finish = 0.0
mse_weight = 0.0
feature_matching_weight = 0.0
encoder_feature_weight = 0.0
