"""Methods that GDFQ is compared with, behind the same interface (`gdfq.quantize` with another `method`)."""
