"""The comparison of PEFT methods: equal searches, seeds, health gates, one table."""
