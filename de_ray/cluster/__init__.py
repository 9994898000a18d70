"""WHERE a run takes place: joining a cluster, what its nodes must reach, storage that outlives them, Ray jobs."""
