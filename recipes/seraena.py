# seraena's TAESDXL notebook, with our discriminator: the adversarial loss alone, its gradient of fixed size, AdamW.
from recipes.author import *

optimizer = "adamw"
learning_rate = 3e-5
discriminator_lr = 3e-4
lowres_weight = 0.0
adversarial_weight = 2.0
adversarial_scaling = "unit"
replay_size = 16384
