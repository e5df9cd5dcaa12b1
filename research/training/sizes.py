"""How large a world's networks and its batches are. Every world module names its own as `SIZES`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of an autoencoder, a transformer, and the batches that they are trained on.

    Args:
        patch (`int`): pixels, along height and width, that become channels before the first convolution.
        base_dims (`tuple[int, int]`): channels of the encoder and of the decoder.
        num_frames (`int`): frames in a batch of the autoencoder.
        latent_channels (`int`): channels of the latents.
        latent_size (`int`): height and width of the latents.
        token (`int`): latent places along height and width that one token covers.
        num_heads (`int`): attention heads, of 32 dimensions each.
        num_layers (`int`): blocks of the transformer; their hidden layer is four times as wide as a token.
        num_images (`int`): single frames in a batch of the images stage.
        num_clips (`int`): clips in a batch of the videos stage.
        num_first_chunks (`int`): first chunks of other videos in that batch: there only the prompt can be read.
        half_files (`bool`): whether a checkpoint stores its weights in float16. They load in float32.
    """

    patch: int = 2
    base_dims: tuple[int, int] = (32, 48)
    num_frames: int = 16
    latent_channels: int = 4
    latent_size: int = 16
    token: int = 2
    num_heads: int = 4
    num_layers: int = 4
    num_images: int = 24
    num_clips: int = 2
    num_first_chunks: int = 12
    half_files: bool = False


SMALL = Sizes()
