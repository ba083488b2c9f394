"""The plain manifests: rendered from the chart, which stays the one source of truth."""
