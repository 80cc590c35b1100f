"""CogVideoX's VAE for --vae-module train.videos.cogvideox_vae_adapter --vae-class CogVideoXVAEWrapper."""

from titans_video.codecs.diffusers import CogVideoXVAEWrapper

__all__ = ["CogVideoXVAEWrapper"]
