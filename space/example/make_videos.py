import torch

from tokentrim import TokenTrimPipeline


torch.set_num_threads(1)
pipe = TokenTrimPipeline.from_pretrained("checkpoints/travelling-world")
prompt = "a fast journey right over hills by noon"
for name, method in {"left": "plain", "right": "tokentrim_plus"}.items():
    generator = torch.Generator().manual_seed(0)
    with pipe.stream(prompt, num_frames=300, method=method, generator=generator) as stream:
        stream.save_video(f"{name}.mp4")
