"""Settings of the command line with which a run of GDFQ is over in seconds, and saves after every iteration."""

SHORT = [
    f"--set={setting}"
    for setting in (
        "method=gdfq", "schedule.epochs=3", "schedule.iterations=2", "schedule.batch_size=8", "schedule.range_epochs=1",
        "schedule.warmup_epochs=1", "schedule.range_batches=1", "run.held_out_images=16", "run.checkpoint_every=1",
    )
]  # fmt: skip
