"""How ranks are started. A launcher gives each rank torchrun's environment and knows nothing of training."""

if __name__ == "launchers":  # the repository is on the path
    from lockstep.utils.places import alias

    alias("launchers")
