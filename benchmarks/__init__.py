"""Speed beside every peer that imports: `python -m benchmarks`. Each figure follows a correctness check."""
