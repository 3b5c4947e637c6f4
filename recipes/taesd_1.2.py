# TAESD 1.2: adversarial + low-res MSE, and D also judges the encoder's latents (taesd issue 11); the weights are ours.
from recipes.author import *

lowres_weight = 1.0
encoder_adversarial_weight = 0.01
