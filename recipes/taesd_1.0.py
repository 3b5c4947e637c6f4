# TAESD 1.0: adversarial + MSE. The losses and the optimizer are from taesd issues 2 and 11; the weights are ours.
from recipes.author import *

mse_weight = 0.1
lowres_weight = 0.0
