"""How ranks are started. A launcher gives each rank torchrun's environment and knows nothing of training."""
