"""Making one model of others: upcycle, extract, join, grow, import."""
