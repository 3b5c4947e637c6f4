"""Terms of the loss that only the published recipes beside this file use: train.py can be read without them.

fake, real: images [N,3,H,W] in [0,1]; scores: the discriminator's, large for real.
"""
import torch
import torch.nn.functional as F

from support.configure import stop


def hinge_discriminator_loss(real_scores, fake_scores):
    """What D minimises in CompVis/latent-diffusion: only scores between -1 and 1 count."""
    return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()


def hinge_adversarial_loss(real_scores, fake_scores):
    """What its decoder minimises: not relativistic, the real image does not matter."""
    return -fake_scores.mean()


FORMS = {"hinge": (hinge_discriminator_loss, hinge_adversarial_loss)}


def frequency_l1(fake, real):
    """L1 of the amplitudes of the 2-D Fourier transform: how much of each frequency there is, wherever it lies."""
    return F.l1_loss(torch.fft.rfft2(fake, norm="ortho").abs(), torch.fft.rfft2(real, norm="ortho").abs())


def lpips(device):
    """The perceptual distance of the `lpips` package, as a function of fake and real."""
    try:
        from lpips import LPIPS
        distance = LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except Exception as error:  # not installed, or its VGG weights cannot be downloaded
        stop(f"--lpips_weight: needs the lpips package and its VGG weights ({error}); pip install lpips, or "
             f"--lpips_weight=0")
    return lambda fake, real: distance(fake * 2 - 1, real * 2 - 1).mean()


# What takes the adversarial loss's place: functions of it, the fakes, the loss so far, the decoder's last weight, and
# the GradScaler

def unit_gradient(adversarial, fake, loss, layer, scaler):
    """A stand-in for the adversarial loss: its gradient on the fakes has a standard deviation of 1 / fake.numel() over
    the batch, so it can neither vanish nor explode (seraena)."""
    gradient = torch.autograd.grad(scaler.scale(adversarial), fake, retain_graph=True)[0]  # matching needs it, too
    return (fake * gradient / (gradient.std() + 1e-12)).mean()


def adaptive(adversarial, fake, loss, layer, scaler):
    """The adversarial loss times the weight that makes its gradient at `layer`, the decoder's last, as large as that of
    the loss so far: of the pixels', for the encoder's has none there (VQGAN, CompVis/latent-diffusion)."""
    gradient, of_adversarial = (torch.autograd.grad(scaler.scale(each), layer, retain_graph=True)[0].norm()
                                for each in (loss, adversarial))
    little = scaler.scale(torch.full_like(gradient, 1e-4))
    return adversarial * (gradient / (of_adversarial + little)).clamp(0, 1e4).detach()


SCALINGS = {"unit": unit_gradient, "adaptive": adaptive}
