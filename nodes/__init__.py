"""The nodes a user drags into a workflow: schema, tooltips, execute. No mathematics, no host internals."""
