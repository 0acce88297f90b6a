"""Names of the published table's rows. No imports: the GPU run reads them before anything is installed."""

PUBLISHED_ROWS = ("minference", "trimix+minference", "trimix+flexprefill", "trimix+xattention")
"""What ``--rows published`` means; stock and TRIMIX, the table's other rows, are always there."""
