# TAESD 1.0: adversarial + MSE. Terms and optimizer from taesd issues 2 and 11; the weights of the terms are ours.
from recipes.author import *

mse_weight = 0.1
lowres_weight = 0.0
