"""A finished result on its way to where the job wants it: a repository of a Hub, or a folder or bucket named by URL."""
