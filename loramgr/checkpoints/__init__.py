"""Base and merged models on disk: what they hold, their digests, and how an adapter's names meet theirs."""
