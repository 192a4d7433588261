"""The subcommands of `moeprune`, one module each; imported only when called."""
