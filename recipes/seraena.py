# seraena's TAESDXL notebook, beside our discriminator: adversarial alone, its gradient of a fixed size; AdamW.
from recipes.author import *

optimizer = "adamw"
learning_rate = 3e-5
lowres_weight = 0.0
adversarial_weight = 2.0
adversarial_scaling = "unit"
replay_size = 16384
