"""Rollcall on a Kubernetes of one's own: a kind cluster, the images, the chart, and ways in."""
