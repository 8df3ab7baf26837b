"""From the simulation to a file that a runtime takes, and whether that file does what the simulation did."""
