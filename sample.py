import torch
from torch import Tensor


class Schedule:
    """
    The noise of Stable Diffusion: z_t = sqrt(a_t) z + sqrt(1 - a_t) noise, for t = 0 .. 999 (equation 1's z_t).

    Seen as in Karras et al. (arXiv 2206.00364), z_t / sqrt(a_t) = z + sigma_t noise with sigma_t^2 = (1 - a_t) / a_t.
    """

    def __init__(self, config: dict):
        start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        self.alphas = (1 - betas).cumprod(0)                     # a_t, (1000,)
        self.sigmas = (1 / self.alphas - 1).sqrt()               # (1000,)
        self.spacing, self.offset = config["timestep_spacing"], config["steps_offset"]
        self.prediction = config["prediction_type"]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t of latents z and noise, each (B, C, H, W), at timesteps (B,)."""
        alphas = self.alphas[timesteps.cpu()].to(latents)[:, None, None, None]
        return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise

    def timesteps(self, steps: int) -> Tensor:
        """The timesteps at which a sampler of that many steps asks the network, noisiest first: (steps,) float64."""
        count = len(self.alphas)
        if self.spacing == "linspace":
            return torch.linspace(0, count - 1, steps, dtype=torch.float64).flip(0)
        if self.spacing == "leading":
            return (torch.arange(steps) * (count // steps)).flip(0).double() + self.offset
        return torch.arange(count, 0, -count / steps, dtype=torch.float64).round() - 1  # trailing


def euler(denoise, noise: Tensor, schedule: Schedule, steps: int, guidance: float) -> Tensor:
    timesteps = schedule.timesteps(steps)
    sigmas = [schedule.sigmas[int(t)].item() for t in timesteps] + [0.0]
    x = noise * (sigmas[0] ** 2 + 1) ** 0.5
    for t, sigma, following in zip(timesteps.tolist(), sigmas, sigmas[1:]):
        d = denoise(x / (sigma**2 + 1) ** 0.5, t)
        x = x + (following - sigma) * d
    return x
