"""Five papers on synthetic medical images and privacy, run again number by number."""

import warnings

# Libraries ask for a progress widget in notebooks; chapters print a line per stage instead, and pages stay clean.
warnings.filterwarnings("ignore", message="IProgress not found")
