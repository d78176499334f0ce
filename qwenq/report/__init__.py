"""Reports of runs: one self-contained page and its Markdown, both from the runs' manifests."""
