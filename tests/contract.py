"""The list of methods, and the rollouts on which they run, for the contract tests."""

from builders import CHUNK, far_pipeline, latent_pipeline, tiny_far


EAGER = {"drift_sensitivity": 0.0, "prune_fraction": 0.3, "warmup_chunks": 1}
METHODS = {
    "plain": {"method": "plain"},
    "tokentrim": EAGER,
    "paper": {"method": "paper", **EAGER},
    "tokentrim_plus": {"method": {"quarantine": {"sensitivity": 0.0}, "reanchor": {}}},
    "reanchor with tolerance": {
        "method": {"quarantine": {"sensitivity": 1.0}, "reanchor": {"tolerance": 1e-4, "patience": 2}}
    },
    "trimmed and reanchored": {"method": {"tokentrim": EAGER, "reanchor": {"match": "moments", "patience": 10}}},
    "covariance": {"method": {"reanchor": {"match": "covariance", "strength": 0.5, "patience": 10}}},
    "first chunk": {"method": {"tokentrim": {**EAGER, "reference": "first", "regenerate": False}}},
    "soft prune": {"method": {"tokentrim": {**EAGER, "prune_weight": 0.3}}},
    "first_step": {"drift_signal": "first_step", **EAGER},
}
ROLLOUTS = {
    "self_forcing": (latent_pipeline, {"window_size": 15}),
    "rolling_forcing": (
        latent_pipeline,
        {"rollout": "rolling_forcing", "num_inference_steps": 3, "window_size": 18},
    ),
    "far": (lambda: far_pipeline(tiny_far(chunk_partition=(CHUNK,))), {}),
}


def runs(method: str, rollout: str) -> bool:
    """Whether a rollout supports a method."""
    return (method, rollout) not in (("first_step", "rolling_forcing"), ("soft prune", "far"))
