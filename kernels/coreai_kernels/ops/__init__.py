"""The operations: schema, shape function, gradient and choice of backend, one file each."""
