//! openraft's runtime over the installed driver.

/// See the module.
#[derive(Debug)]
pub struct Runtime;
