# What the recipes of TAESD's author share (taesd issue 11): Adam for all, a constant rate; no windows, no pixel MSE,
# no features of encoder or D.
optimizer = "adam"
learning_rate = 3e-4
discriminator_lr = 3e-4
cooldown = 0.0
window = 0
mse_weight = 0.0
feature_matching_weight = 0.0
encoder_feature_weight = 0.0
