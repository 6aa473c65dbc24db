"""The device mesh, the table that lays arrays out over it, and starting several processes."""
